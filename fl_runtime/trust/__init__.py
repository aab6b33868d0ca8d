"""Who is who and who may what: certificates, startup kits, permissions, site policy, audit log.

Stands on types and errors alone; the only place that imports `cryptography` (the extra `[trust]`).
"""
