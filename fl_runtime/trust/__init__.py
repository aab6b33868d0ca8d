"""Who is who and who may what: certificates, startup kits, permissions, site policy, audit log; and streams between
sites that only they can read.

Stands on types and errors alone; the only place that imports `cryptography`, which an extra brings.
"""
