"Tests of XLA: only where torch_xla is installed (`make test-xla`); elsewhere nothing here is collected."
import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["*.py"]
# XLA's CPU devices; quick to compile rather than quick to run. Before torch_xla is imported
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true")
