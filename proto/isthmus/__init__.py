"""The contract that all programs share: wire format, bundle, delta, errors, configuration, command line.

What two processes must agree on byte for byte lives here; nothing here imports a program.
"""

__version__ = "0.1.0"
