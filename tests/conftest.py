"""What all tests share. TLS 1.3 is enforced before anything imports grpc, as the programs do."""

from isthmus import tls13

tls13.enforce()
