# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's scheduler process: who holds which page."""
