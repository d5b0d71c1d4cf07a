"""Settings of every test run."""

import os

# Tests leave nothing in the user's cache; those about the cache name a folder of their own.
os.environ["AIPROD_CACHE_DIR"] = "off"
# Nor among the user's records of runs.
os.environ["AIPROD_ANALYTICS"] = "off"
