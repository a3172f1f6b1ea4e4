import { asCSV, figure } from '../src/console/usagerows';

describe('the report of usage', () => {
  it('has little, but some, told from none', () => {
    expect([0, 0.01, 0.1, 12.34].map(figure)).toEqual(['0.0', '< 0.1', '0.1', '12.3']);
  });

  it('is CSV that a spreadsheet reads, whatever users are called', () => {
    const hours = { granted_h: 2, computing_h: 1.5, idle_h: 0.25, unknown_h: 0.25, parked_h: 0 };
    expect(asCSV('user', [{ name: 'a "b", c', gpu: '', leases: 3, ...hours }])).toBe(
      'user,server_and_index,leases,granted_h,computing_h,idle_h,unknown_h,parked_h\n' +
        '"a ""b"", c",,3,2,1.5,0.25,0.25,0\n'
    );
  });
});
