"""The operator: looks at a run and its Ray cluster, decides the next step (`core`), takes it (`adapters`), again and again."""
