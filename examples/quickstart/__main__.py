"""`python -m examples.quickstart`: the whole product on real data, in one command (`make demo`)."""

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

from examples.quickstart.cli import app  # noqa: E402

app()
