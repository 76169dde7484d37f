"""The compiler: from two ONNX files and labelled data to one bundle that devices and the cloud can run.

It runs on the operator's machine only. `compiler.pipeline` lists the stages in order.
"""
