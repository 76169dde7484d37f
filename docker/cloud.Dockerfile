# Gateway, registry and fleet service. Triton comes with the image (CPU, Python backend) or runs beside it (--triton).
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY security security
COPY cloud cloud
COPY edge/__init__.py edge/__init__.py
COPY compiler/__init__.py compiler/__init__.py
RUN python -m venv /opt/isthmus \
    && /opt/isthmus/bin/pip install --no-cache-dir -c constraints.txt ".[cloud]"

FROM ${PYTHON}
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/isthmus isthmus
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /var/lib/isthmus
EXPOSE 8443 8444
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8443), 3).close()"]
ENTRYPOINT ["isthmus", "cloud"]
CMD ["serve", "--home", "/var/lib/isthmus", "--listen", "0.0.0.0:8443"]
