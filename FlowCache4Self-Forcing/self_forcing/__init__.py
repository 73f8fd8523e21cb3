"""Self-Forcing and Causal-Forcing with FlowCache."""
