"""What all packages' tests share."""

import os

# No test writes into the records of the user who runs it.
os.environ["AIPROD_ANALYTICS"] = "off"
