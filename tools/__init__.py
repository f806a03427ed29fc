"""Programs for the people who build this: benchmarks, studies and mutation runs. None of them tests anything."""
