"""What every test of this repository needs: pytester for the plugin, and the repository's root on sys.path."""

pytest_plugins = ["pytester"]
