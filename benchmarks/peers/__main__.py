"""`python -m benchmarks.peers`: install the peers that need an environment of their own."""

from benchmarks.peers.optimum import install

if __name__ == "__main__":
    install()
