"Say in one line when the Python that make found is too old. Runs on any Python."

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "make: needs Python 3.11 or newer, found %s at %s; try PYTHON=python3.12 make ..."
        % (sys.version.split()[0], sys.executable)
    )
