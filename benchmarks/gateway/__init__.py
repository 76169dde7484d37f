"""What the gateway costs: over Triton itself, for a token, and for a device that is connected.

`python -m benchmarks.gateway [--quick] [--json FILE]`. One Triton, reached over loopback by everybody: callers ask it
directly and in plain text, ask it through the gateway (`isthmus cloud serve`, TLS 1.3, a token that is verified), and
ask a server that does nothing but echo over TLS, with the gateway's own gRPC stack. These three take turns in short
slices, so that whatever else the machine does hits all of them; a figure is the median of the slices' medians. Each
round waits a while for the machine to have little else to do, and the table says how often it had. Beside the times
that pass stands the processor time that the gateway and the echo take for a request, which says more on a busy machine.

- The goal is of the difference: what the gateway adds to Triton is at most 1.2 times that one hop, the echo.
- A token is verified in at most 5 microseconds when it was seen before.
- 1,000 devices with a TLS connection and an open Watch stream each take at most 100 KiB of the gateway's memory each.
"""
