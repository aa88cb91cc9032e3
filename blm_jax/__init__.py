"""BLM: one model that answers questions about what it sees and drives robot arms, for JAX meshes."""
