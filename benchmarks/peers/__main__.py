"""`python -m benchmarks.peers`: install the peers that need an environment of their own."""

from benchmarks.peers import optimum
from benchmarks.servers import mlserver

if __name__ == "__main__":
    optimum.install()
    mlserver.install()
