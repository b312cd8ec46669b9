# SPDX-License-Identifier: Apache-2.0
"""Tensor code on head pages: imports torch (and triton) alone, so it runs without vLLM.

``reference`` is plain PyTorch for any device, ``triton_*`` the same functions for a
GPU. Both work on one flat pool ``[num_pages, 1, page_size, 2 * head_size]``, whose
pages hold ``page_size`` tokens of ONE KV head: a token's K is ``pool[p, 0, t, :D]`` and
its V, right behind it, ``pool[p, 0, t, D:]``.
"""
