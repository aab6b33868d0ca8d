"""Authentication and authorisation: certificates, startup kits, permissions, site policy, audit log, secure streams.

It imports `cryptography`, as `secure_sum` does, and alone `pyzipper`; the extra `[trust]` brings both. Of our own
modules it imports only types, errors and the version.
"""
