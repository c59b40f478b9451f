"""`sawkv bench`: caches of one model under load on this machine, served by vLLM and loaded by vLLM's generator."""
