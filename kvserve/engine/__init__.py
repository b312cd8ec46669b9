# SPDX-License-Identifier: Apache-2.0
"""What extends vLLM: the KV cache spec, its manager, the backend and the worker."""
