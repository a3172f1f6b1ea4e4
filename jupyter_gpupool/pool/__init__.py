"""The allocation of GPU slices: placement, queue, tenancy and the ledger. Does no networking."""
