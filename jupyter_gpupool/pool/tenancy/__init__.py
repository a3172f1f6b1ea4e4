"""Who may use the pool: namespaces, tokens, and the audit log."""
