"""The names of sizes, used verbatim in the op's schema, kernels, passes, tests and README.

| symbol                         | meaning                                        | DeepSeek-V3 |
|--------------------------------|------------------------------------------------|-------------|
| B, T                           | sequences; query tokens in all, T = Σ Sq       |             |
| Sq, Skv                        | query tokens, cached tokens of one sequence    | 1, ≤ 128 K  |
| N                              | query heads (after tensor parallel split)      | 128         |
| Lkv                            | latent rank: K's "nope" part and all of V      | 512         |
| R                              | rope dims                                      | 64          |
| P, V                           | per-head nope and value dims before absorption | 128, 128    |
| q_nope [T,N,Lkv], q_pe [T,N,R] | absorbed query, rope query                     |             |
| kv_c [pages,page_size,Lkv]     | latent cache: keys and values                  |             |
| k_pe [pages,page_size,R]       | rope cache; often a slice of kv_c's buffer     |             |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of one call that the host knows. Skv is not among them: it lives on the device."""

    B: int
    T: int
    Sq: int  # query tokens of the longest sequence
    N: int
    Lkv: int
    R: int
