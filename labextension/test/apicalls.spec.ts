import { asCommand, callsOf, IDocument, matching, objectsOf } from '../src/console/apicalls';

const DOCUMENT: IDocument = {
  info: { version: '1.2' },
  paths: {
    '/leases': {
      get: {
        operationId: 'listLeases',
        summary: 'List the leases',
        parameters: [
          { name: 'all', in: 'query', schema: { type: 'integer', enum: [0, 1], default: 0 } }
        ],
        responses: {
          200: { description: 'The leases', content: json({ $ref: '#/components/schemas/Leases' }) }
        }
      }
    },
    '/tokens/{id}': {
      parameters: [{ name: 'id', in: 'path', required: true, schema: { type: 'string' } }],
      patch: {
        operationId: 'extendToken',
        summary: "Set the token's lifetime",
        requestBody: { content: json({ $ref: '#/components/schemas/Life' }) },
        responses: { 404: { description: 'There is no such token.' } }
      }
    }
  },
  components: {
    schemas: {
      Life: {
        type: 'object',
        description: 'How long it lasts.',
        required: ['expires_s'],
        properties: {
          expires_s: { type: ['number', 'null'], exclusiveMinimum: 0, description: 'Seconds.' },
          share: { type: 'number', minimum: 0, maximum: 1, default: 0.5 },
          names: { type: 'array', items: { $ref: '#/components/schemas/Leases' } },
          limits: { type: 'object', additionalProperties: { type: 'string' } },
          either: { anyOf: [{ const: 'x' }, { $ref: '#/components/schemas/Leases' }] }
        }
      },
      Leases: { type: 'array', items: { type: 'string' } }
    }
  }
};

function json(schema: object) {
  return { 'application/json': { schema } };
}

describe('the calls of an OpenAPI document', () => {
  const [list, extend] = callsOf(DOCUMENT);

  it('have their path, parameters, body and answers', () => {
    expect(list).toMatchObject({ method: 'GET', path: '/leases', body: '' });
    expect(list?.parameters).toEqual([
      { name: 'all', kind: '0 | 1, default 0', where: 'query', required: false, description: '' }
    ]);
    expect(list?.answers).toEqual([{ status: '200', description: 'The leases', brings: 'Leases' }]);
    expect(extend).toMatchObject({ method: 'PATCH', body: 'Life' });
    expect(extend?.parameters).toMatchObject([{ name: 'id', where: 'path', required: true }]);
    expect(extend?.answers).toMatchObject([{ status: '404', brings: '' }]);
  });

  it('are found by any of their words', () => {
    const found = (search: string) => matching(callsOf(DOCUMENT), search).map(call => call.id);
    expect(found('')).toEqual(['listLeases', 'extendToken']);
    expect(found('LEASES all')).toEqual(['listLeases']);
    expect(found('patch lifetime')).toEqual(['extendToken']);
    expect(found('leases lifetime')).toEqual([]);
  });

  it('are commands of a shell', () => {
    const base = 'https://pool:8443/gpupool/api/v1/';
    expect([list, extend].map(call => call && asCommand(call, base))).toEqual([
      `curl -H "Authorization: Bearer $TOKEN" '${base}leases'`,
      `curl -H "Authorization: Bearer $TOKEN" -X PATCH --json @body.json '${base}tokens/{id}'`
    ]);
  });

  it('take and bring objects, whose members say what they may be', () => {
    const [leases, life] = objectsOf(DOCUMENT);
    expect(leases).toEqual({
      name: 'Leases',
      description: '',
      kind: 'array of string',
      fields: []
    });
    expect(life?.fields.map(field => [field.name, field.kind, field.required])).toEqual([
      ['expires_s', 'number | null, > 0', true],
      ['share', 'number, ≥ 0, ≤ 1, default 0.5', false],
      ['names', 'array of Leases', false],
      ['limits', 'object of string', false],
      ['either', '"x" | Leases', false]
    ]);
  });
});
