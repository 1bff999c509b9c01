"""Models: loading, the policy/reference/value wrapper and the one scoring path."""
