"""`python -m slidevlm` is `slidevlm`; torchrun wants a module."""

from slidevlm.cli import main

raise SystemExit(main())
