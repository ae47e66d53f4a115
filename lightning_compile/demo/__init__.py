"""The demonstration: one small model, trained in eager mode, under Inductor and under this backend, and compared."""
