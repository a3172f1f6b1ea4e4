/** The calls of the pool's OpenAPI document, in the words of the Console's page of them. Pure. */

/** A JSON schema, as far as the pool's document has them. */
export interface ISchema {
  $ref?: string;
  type?: string | string[];
  const?: unknown;
  enum?: unknown[];
  anyOf?: ISchema[];
  items?: ISchema;
  properties?: Record<string, ISchema>;
  additionalProperties?: ISchema | boolean;
  required?: string[];
  minimum?: number;
  exclusiveMinimum?: number;
  maximum?: number;
  default?: unknown;
  description?: string;
}

interface IContent {
  content?: Record<string, { schema?: ISchema }>;
}

interface IParameter {
  name: string;
  in: string;
  required?: boolean;
  description?: string;
  schema?: ISchema;
}

interface IOperation {
  operationId: string;
  summary: string;
  parameters?: IParameter[];
  requestBody?: IContent;
  responses: Record<string, IContent & { description: string }>;
}

/** The part of an OpenAPI 3.1 document that is read. */
export interface IDocument {
  info: { version: string };
  paths: Record<string, Partial<Record<Method, IOperation>> & { parameters?: IParameter[] }>;
  components: { schemas: Record<string, ISchema> };
}

const METHODS = ['get', 'post', 'put', 'patch', 'delete'] as const;
type Method = (typeof METHODS)[number];

/** A parameter or a member of an object. `kind`: its type, limits and default, in words. */
export interface IField {
  name: string;
  kind: string;
  /** Where a parameter stands: path, query or header; empty for a member of an object. */
  where: string;
  required: boolean;
  description: string;
}

export interface IAnswer {
  status: string;
  description: string;
  /** The object that it brings; empty if none has a name. */
  brings: string;
}

export interface ICall {
  id: string;
  method: string;
  path: string;
  summary: string;
  parameters: IField[];
  /** The object that the body is; empty without a body. */
  body: string;
  answers: IAnswer[];
}

/** An object that calls take or bring, by its name in the document. */
export interface IObject {
  name: string;
  description: string;
  /** What it is where it is no object with members. */
  kind: string;
  fields: IField[];
}

/** Every call, in the document's order. */
export function callsOf(document: IDocument): ICall[] {
  return Object.entries(document.paths).flatMap(([path, item]) =>
    METHODS.flatMap(method => {
      const operation = item[method];
      if (!operation) {
        return [];
      }
      const parameters = [...(item.parameters ?? []), ...(operation.parameters ?? [])];
      return {
        id: operation.operationId,
        method: method.toUpperCase(),
        path,
        summary: operation.summary,
        parameters: parameters.map(one => ({
          name: one.name,
          kind: kindOf(one.schema ?? {}),
          where: one.in,
          required: one.required === true,
          description: one.description ?? ''
        })),
        body: nameIn(operation.requestBody),
        answers: Object.entries(operation.responses).map(([status, answer]) => ({
          status,
          description: answer.description,
          brings: nameIn(answer)
        }))
      };
    })
  );
}

/** Every object that has a name, by name. */
export function objectsOf(document: IDocument): IObject[] {
  return Object.entries(document.components.schemas)
    .map(([name, schema]) => ({
      name,
      description: schema.description ?? '',
      kind: schema.properties ? '' : kindOf(schema),
      fields: Object.entries(schema.properties ?? {}).map(([field, of]) => ({
        name: field,
        kind: kindOf(of),
        where: '',
        required: (schema.required ?? []).includes(field),
        description: of.description ?? ''
      }))
    }))
    .sort((one, other) => (one.name < other.name ? -1 : 1));
}

/** The calls that contain every word of a search, in path, method, summary or names. */
export function matching(calls: readonly ICall[], search: string): ICall[] {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  return calls.filter(call => {
    const names = call.parameters.map(field => field.name);
    const text = [call.method, call.path, call.summary, call.id, call.body, ...names]
      .join(' ')
      .toLowerCase();
    return words.every(word => text.includes(word));
  });
}

/** The call in a shell. `base`: the URL of the calls, with a slash at its end. */
export function asCommand(call: ICall, base: string): string {
  const words = ['curl', '-H "Authorization: Bearer $TOKEN"'];
  if (call.method !== 'GET') {
    words.push(`-X ${call.method}`);
  }
  if (call.body) {
    words.push('--json @body.json');
  }
  return [...words, `'${base}${call.path.slice(1)}'`].join(' ');
}

function nameIn(some: IContent | undefined): string {
  return nameOf(Object.values(some?.content ?? {})[0]?.schema ?? {});
}

function nameOf(schema: ISchema): string {
  return schema.$ref?.split('/').pop() ?? '';
}

function kindOf(schema: ISchema): string {
  return [typeOf(schema), ...limitsOf(schema)].join(', ');
}

function typeOf(schema: ISchema): string {
  if (schema.$ref) {
    return nameOf(schema);
  }
  if (schema.const !== undefined) {
    return JSON.stringify(schema.const);
  }
  if (schema.enum) {
    return schema.enum.map(value => JSON.stringify(value)).join(' | ');
  }
  if (schema.anyOf) {
    return schema.anyOf.map(typeOf).join(' | ');
  }
  const types = [schema.type ?? 'any value'].flat();
  return types.map(type => elements(type, schema)).join(' | ');
}

function elements(type: string, schema: ISchema): string {
  if (type === 'array') {
    return `array of ${typeOf(schema.items ?? {})}`;
  }
  const values = schema.additionalProperties;
  return type === 'object' && typeof values === 'object' ? `object of ${typeOf(values)}` : type;
}

function limitsOf(schema: ISchema): string[] {
  const limits: string[] = [];
  if (schema.minimum !== undefined) {
    limits.push(`≥ ${schema.minimum}`);
  }
  if (schema.exclusiveMinimum !== undefined) {
    limits.push(`> ${schema.exclusiveMinimum}`);
  }
  if (schema.maximum !== undefined) {
    limits.push(`≤ ${schema.maximum}`);
  }
  if (schema.default !== undefined) {
    limits.push(`default ${JSON.stringify(schema.default)}`);
  }
  return limits;
}
