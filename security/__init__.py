"""Identity and trust, shared by all programs: TLS 1.3, access tokens, enrolment, and signed update metadata.

Rules that hold everywhere in this package:

- algorithms are pinned here and never read from what a peer sent;
- a failed verification is an exception with a machine-readable reason, never a False;
- clocks are handed in, private keys are created with mode 0600 and are never printed, logged or sent.
"""
