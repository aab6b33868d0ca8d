"""Authentication and authorisation: certificates, startup kits, permissions, site policy, audit log, secure streams.

It is the only package that imports `cryptography` and `pyzipper`, which the extra `[trust]` brings. Of our own modules
it imports only types, errors and the version.
"""
