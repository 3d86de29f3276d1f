"""llama.cpp: a `Llama` with adapters that can be changed while it runs, and a batched engine."""
