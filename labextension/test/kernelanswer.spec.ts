import { ENTRY, errorLine } from '../src/leases/kernelanswer';
import { english } from './english';

const line = (error: string, said = '') => errorLine({ error, said }, english);

it('a kernel that did what it was asked has no line', () => {
  expect(line('', '1 GPU')).toBe('');
});

it('a kernel with an older package is to be restarted', () => {
  const said = `AttributeError: module 'jupyter_gpupool' has no attribute '${ENTRY}'`;
  expect(line('AttributeError', said)).toMatch(/older version .* restart the kernel/);
});

it('a kernel without the package is to get it', () => {
  expect(line('ModuleNotFoundError')).toMatch(/%pip install jupyter_gpupool/);
});

it("the kernel's own line is passed on, and silence has a line too", () => {
  expect(line('NoCapacity', 'no GPU is free')).toBe('no GPU is free');
  expect(line('AttributeError', 'AttributeError: x')).toBe('AttributeError: x');
  expect(line('NoAnswer')).toMatch(/did not answer/);
});
