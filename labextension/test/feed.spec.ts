import { Feed, SILENCE_MS } from '../src/pool/feed';
import { Message } from '../src/pool/apitypes';
import { delta, whole } from './pool';

/** The server's end of a connection. */
class Line {
  constructor(readonly query: string) {}
  onmessage: (event: { data: string }) => void = () => undefined;
  onclose: (event: { reason: string }) => void = () => undefined;
  closed = false;
  close(): void {
    this.closed = true;
  }
  say(message: Message | string): void {
    const data = typeof message === 'string' ? message : JSON.stringify(message);
    this.onmessage({ data });
  }
  break(reason = ''): void {
    this.onclose({ reason });
  }
}

function setUp(why = '') {
  const lines: Line[] = [];
  const feed: Feed = new Feed({
    connect: query => {
      lines.push(new Line(query));
      return lines[lines.length - 1] as unknown as WebSocket;
    },
    why: async () => why,
    onChange: () => undefined
  });
  return { feed, lines };
}

beforeEach(() => jest.useFakeTimers());
afterEach(() => jest.useRealTimers());

it('is live from the first message', () => {
  const { feed, lines } = setUp();
  feed.start();
  expect(feed.connection.status).toBe('connecting');
  expect(lines[0].query).toBe('');
  lines[0].say(whole());
  expect(feed.connection.status).toBe('live');
  expect(feed.state?.seq).toBe(0);
});

it('says that it is lost, and goes on where it was', () => {
  const { feed, lines } = setUp();
  feed.start();
  lines[0].say(whole());
  lines[0].say(delta(1));
  lines[0].break('the pool is restarting');
  expect(feed.connection).toMatchObject({ status: 'lost', reason: 'the pool is restarting' });
  expect(feed.state?.seq).toBe(1); // to be shown as what it is: old
  jest.advanceTimersByTime(1000);
  expect(lines[1].query).toBe('?feed=f&seq=1');
  lines[1].say({ type: 'resumed', feed: 'f', seq: 1, at: 1 });
  lines[1].say(delta(2));
  expect(feed.connection.status).toBe('live');
  expect(feed.state?.seq).toBe(2);
});

it('is lost when the pool falls silent', () => {
  const { feed, lines } = setUp();
  feed.start();
  lines[0].say(whole());
  jest.advanceTimersByTime(SILENCE_MS + 1);
  expect(feed.connection.status).toBe('lost');
  expect(lines[0].closed).toBe(true);
  lines[0].say(delta(1));
  expect(feed.state?.seq).toBe(0); // nobody listens on the old line
});

it('tries again, later and later, never later than a quarter of a minute or so', () => {
  const { feed, lines } = setUp();
  feed.start();
  const pauses: number[] = [];
  for (let round = 0; round < 12; round++) {
    lines[lines.length - 1].break();
    const pause = feed.connection.retryAt - Date.now();
    pauses.push(pause);
    jest.advanceTimersByTime(pause + 1);
  }
  expect(lines).toHaveLength(13);
  expect(pauses[0]).toBeLessThan(1000);
  expect(Math.max(...pauses)).toBeLessThan(20000);
  expect(pauses[11]).toBeGreaterThan(pauses[0]);
});

it('asks for everything when a message does not follow', () => {
  const { feed, lines } = setUp();
  feed.start();
  lines[0].say(whole());
  lines[0].say(delta(5));
  expect(lines[0].closed).toBe(true);
  expect(lines[1].query).toBe('');
  lines[1].say('no JSON');
  expect(lines[2].query).toBe('');
});

it('asks why, where a socket did not say', async () => {
  const { feed, lines } = setUp('the ledger cannot be read');
  feed.start();
  lines[0].break();
  await jest.advanceTimersByTimeAsync(0);
  expect(feed.connection.reason).toBe('the ledger cannot be read');
});

it('tries at once when it is told to', () => {
  const { feed, lines } = setUp();
  feed.start();
  lines[0].break();
  feed.retry();
  expect(lines).toHaveLength(2);
  jest.advanceTimersByTime(SILENCE_MS - 1);
  expect(lines).toHaveLength(2); // the timer of the first try is gone
});

it('rests while nobody wants it, and leaves no timer', () => {
  const { feed, lines } = setUp();
  feed.start();
  lines[0].say(whole());
  feed.stop();
  expect(feed.connection.status).toBe('off');
  expect(lines[0].closed).toBe(true);
  expect(jest.getTimerCount()).toBe(0);
  lines[0].break();
  expect(jest.getTimerCount()).toBe(0);
  feed.start();
  expect(lines[1].query).toBe('?feed=f&seq=0');
});
