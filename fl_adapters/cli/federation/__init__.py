"""Commands of a provisioned federation: startup kits, certificates, the server, and running a job at a site."""
