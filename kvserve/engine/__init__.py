# SPDX-License-Identifier: Apache-2.0
"""What extends vLLM, by process; here is what crosses from one to another."""
