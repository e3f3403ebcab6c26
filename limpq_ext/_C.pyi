compiler: str
build_flags: str
cuda_version: str
cuda_architectures: str

def cpu_capability() -> str: ...
