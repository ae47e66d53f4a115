"""Measurements of the operator beside others on one device, in one run: `lightning-compile bench`."""
