__version__ = "0.1.0"
from . import basics # before torch is imported: see there what accounts without a name need
