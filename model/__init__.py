"""The policy: whatever touches tokens or weights."""
