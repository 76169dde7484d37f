from __future__ import annotations

from benchmarks.cells.verdicts import Verdict
from benchmarks.support import Column, Entry, coverage, markdown

OPENVINO, TVM = Column("openvino", "fp32"), Column("tvm", "fp32")
ENTRIES = [
    Entry("minilm", OPENVINO, Verdict("green", "3e-07"), least_ms=17.4),
    Entry("minilm", TVM, Verdict("green", "2e-07"), setting="gentle", least_ms=20.1),
    Entry("gru-tagger", OPENVINO, Verdict("green", "1e-06"), least_ms=2.0),
    Entry("gru-tagger", TVM, Verdict("refused", "operator GRU (node 'gru') is not known", "use target onnxruntime")),
    Entry("silero-vad", OPENVINO, Verdict("failed", "cannot convert"), by_hand="OpConversionFailure: If"),
]
MODELS = ["minilm", "gru-tagger", "silero-vad"]


def test_coverage_counts_what_was_tried() -> None:
    assert coverage(ENTRIES, OPENVINO, MODELS) == (2, 3)
    assert coverage(ENTRIES, TVM, MODELS) == (1, 2)
    assert coverage(ENTRIES, TVM, ["minilm"]) == (1, 1)


def test_the_page_names_the_reason_of_every_gap_and_what_to_use_instead() -> None:
    page = markdown(ENTRIES, [OPENVINO, TVM], MODELS)
    assert (
        "- **tvm fp32, gru-tagger**: operator GRU (node 'gru') is not known. Instead: use target onnxruntime." in page
    )
    assert "By hand, the tool itself: OpConversionFailure: If." in page
    assert page.count("- **") == len([entry for entry in ENTRIES if not entry.verdict.covered]) + 3  # and the legend


def test_the_table_has_a_row_for_each_model_and_stars_random_weights() -> None:
    lines = markdown(ENTRIES, [OPENVINO, TVM], MODELS).splitlines()
    assert "| minilm | ✓ 17.4 ms, 3e-07 | ✓ 20.1 ms, 2e-07 (gentle) |" in lines
    assert "| gru-tagger\\* | ✓ 2 ms, 1e-06 | – |" in lines
    assert "| silero-vad | ✗ |  |" in lines
    assert "| **of the models above** | 2 of 3 (67%) | 1 of 2 (50%) |" in lines
