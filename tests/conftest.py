"""What all tests share, done before anything imports grpc or OpenVINO, as the programs do."""

from isthmus import tls13
from isthmus.privacy import forbid_usage_reports

tls13.enforce()
forbid_usage_reports()
