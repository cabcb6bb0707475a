"""Adapters that put the kvarn pool behind the cache interfaces of other libraries."""
