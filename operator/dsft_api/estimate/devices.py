"""Memory of GPUs by the label that NVIDIA's device plugin puts on nodes, `nvidia.com/gpu.product`."""

from collections.abc import Iterable

from dsft_api.spec.placement import NodePool

PRODUCT_LABEL = "nvidia.com/gpu.product"

# MiB as nvidia-smi shows them, a little less than the name says. Suffixes such as -SHARED or -MIG-1g.10gb are other devices.
MEMORY_MIB = {
    "Tesla-T4": 15_360,
    "Tesla-V100-SXM2-16GB": 16_384,
    "Tesla-V100-SXM2-32GB": 32_768,
    "NVIDIA-L4": 23_034,
    "NVIDIA-A10G": 23_028,
    "NVIDIA-A10": 23_028,
    "NVIDIA-L40S": 46_068,
    "NVIDIA-A100-SXM4-40GB": 40_960,
    "NVIDIA-A100-PCIE-40GB": 40_960,
    "NVIDIA-A100-SXM4-80GB": 81_920,
    "NVIDIA-A100-80GB-PCIe": 81_920,
    "NVIDIA-H100-80GB-HBM3": 81_559,
    "NVIDIA-H100-PCIe": 81_559,
    "NVIDIA-H200": 143_771,
    "NVIDIA-B200": 183_359,
}


def gpu_bytes(pools: Iterable[NodePool]) -> int | None:
    """Memory of the smallest GPU among pools with GPUs; None unless all of them select a product that is known."""
    sizes = [MEMORY_MIB.get(pool.node_selector.get(PRODUCT_LABEL, "")) for pool in pools if pool.gpus_per_node]
    known = [size for size in sizes if size is not None]
    return min(known) * 2**20 if known and len(known) == len(sizes) else None
