"""Tests of cedkv.execution."""
