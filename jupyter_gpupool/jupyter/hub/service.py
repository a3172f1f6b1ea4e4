"""The former place of :mod:`jupyter_gpupool.hub.service.app`; kept until 1.0 for units that start it."""

from jupyter_gpupool.hub.service.app import main

if __name__ == "__main__":
    main()
