"""The algorithms: one file each, on one of three families (on-policy, preference, supervised)."""
