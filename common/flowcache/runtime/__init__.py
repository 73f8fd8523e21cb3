"""What a run needs around the method: settings, plan, memory, processes, statistics, video."""
