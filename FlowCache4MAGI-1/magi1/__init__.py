"""MAGI-1 video generation with FlowCache."""
