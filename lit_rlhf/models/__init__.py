"""Models: loading, the policy/reference wrapper and the one scoring path."""
