"""What every test of this repository needs: pytester, the repository's root on sys.path, and hypothesis' profiles."""

import importlib.metadata
import importlib.util
import os

pytest_plugins = ["pytester"]

# a clone in which nothing was installed
if not importlib.metadata.entry_points(group="pytest11", name="sftguard"):
    pytest_plugins.append("pytest_sftguard.plugin")

# a GPU machine that runs the matrix alone may lack it
if importlib.util.find_spec("hypothesis"):
    from hypothesis import Phase, settings

    settings.register_profile("quick", max_examples=100, deadline=None, print_blob=True)
    settings.register_profile("thorough", max_examples=1_000, deadline=None, print_blob=True)
    # whether a test fails, not where: shrinking takes longer than all the rest
    settings.register_profile(
        "mutation",
        max_examples=50,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
