"""A program of its own: load one ONNX model in little memory, run it at some sizes, and say what came out.

It is started by `loading`, which reads what it prints. Loading folds constants and so computes part of the model, which
a hostile one makes as long and as large as it likes: here that ends this process and nothing else.

Reads JSON from standard input: path, memory (bytes), runs (a list of {input: [datatype, shape]}), folded (where to
write the model with its constants folded, or ""). Writes JSON:
{"error": text} when the model cannot be loaded, {"memory": text} when it or a run needs more than it may have, else
{"shapes": [{output: shape}, ...]} with null where a run failed otherwise.
"""

import json
import resource
import sys
from typing import Any


def main() -> None:
    """Do what standard input asks for."""
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if job["folded"]:  # standard operators only
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = job["folded"]
    try:
        session = onnxruntime.InferenceSession(job["path"], options, providers=["CPUExecutionProvider"])
        answer: dict[str, Any] = {"shapes": [_run(session, one) for one in job["runs"]]}
    except MemoryError as error:
        answer = {"memory": str(error)[:600]}
    except Exception as error:  # whatever it is, it is the answer
        text = str(error)[:600] or type(error).__name__
        answer = {"memory" if _of_memory(text) else "error": text}
    json.dump(answer, sys.stdout)


def _run(session: Any, inputs: dict[str, tuple[str, list[int]]]) -> dict[str, list[int]] | None:
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {}
    for name, (datatype, shape) in inputs.items():
        dtype = np.dtype(datatype)
        real = dtype.kind == "f"
        arrays[name] = generator.random(shape).astype(dtype) if real else np.ones(shape, dtype)
    names = [output.name for output in session.get_outputs()]
    try:
        return {name: list(array.shape) for name, array in zip(names, session.run(None, arrays), strict=True)}
    except Exception as error:
        if _of_memory(str(error)):
            raise MemoryError(str(error)) from error
        return None  # the sizes do not suit this model


def _of_memory(text: str) -> bool:
    """Return whether ONNX Runtime says that memory was not enough: it has no class for that."""
    return any(
        words in text for words in ("Failed to allocate", "bad_alloc", "bad allocation", "would require more than")
    )


if __name__ == "__main__":
    main()
